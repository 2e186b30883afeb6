"""The doctor: checks of hosts, links, clocks and the shared folder, without training."""
