"""SGD and learning rate schedules."""
