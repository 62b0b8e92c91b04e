"""Where images come from: listing them, and reading one."""
