"""What outlives a process: files that are whole, verified, and safe to read."""
