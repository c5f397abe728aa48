"""From what can go to a smaller model, and the plan that repeats it."""
