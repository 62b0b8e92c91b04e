"""What people do with a dataset."""
