"""Trainings that show what a loss is worth: why it can fall while mAP stays 0, and what helps."""
