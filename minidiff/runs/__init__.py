"""Folders of trainings: written while they run, and gone on with."""
