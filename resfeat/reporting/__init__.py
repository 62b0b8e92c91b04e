"""What a run did, and what limits it."""
