"""Files in and out: reading volumes, their brain, and writing results."""
