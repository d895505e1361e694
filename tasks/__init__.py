"""What is learned: data, how it is dealt to clients, models, metrics. `tasks.task.open_task` brings them together."""
