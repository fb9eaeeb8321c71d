"""Parts of a training: its settings, optimisers, schedules, the weights' update, averaging and the loop's frame."""
