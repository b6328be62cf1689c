"""What ``generation.py`` measures, and how."""
