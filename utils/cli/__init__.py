"""What a person types, and how a command answers, writes and ends."""
