"""The other processes: who they are, how to join them, what to say to them."""
