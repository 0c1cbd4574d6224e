"""The commands that train and use models, one a file."""
