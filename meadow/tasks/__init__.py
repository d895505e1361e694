"""What is learned: data, how it is dealt to clients, models, metrics. `meadow.tasks.task.open_task` brings them together."""
