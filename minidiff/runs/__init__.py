"""Run folders: written during training, and resumed from."""
