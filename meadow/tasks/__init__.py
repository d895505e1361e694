"""Data sets, their splits over clients, models, losses and metrics; `meadow.tasks.task.open_task` combines them."""
