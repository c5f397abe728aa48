"""What comes after the training: figures, the artifact's files, reading them back."""
