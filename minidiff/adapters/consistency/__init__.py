"""Consistency models: few steps, distilled from a trained model."""
