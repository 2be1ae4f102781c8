"""Many cases: finding them among files and folders, tables, splits."""
