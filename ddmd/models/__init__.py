"""The slim networks and the weights file that holds them."""
