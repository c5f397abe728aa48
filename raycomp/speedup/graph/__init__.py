"""A model as a graph of typed operators, and its coordinates as atoms."""
