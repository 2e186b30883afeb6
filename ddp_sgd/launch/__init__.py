"""Launcher: torchrun as a child process, which is restarted, watched and stopped."""
