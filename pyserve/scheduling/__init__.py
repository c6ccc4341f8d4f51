"""Who may generate when, and on which model: the queue, the models and their versions."""
