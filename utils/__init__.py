"""What the trainer needs besides the models: a folder for each concern, which uses those below it alone."""
