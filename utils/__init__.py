"""What the trainer needs besides the models: one file for each concern."""
