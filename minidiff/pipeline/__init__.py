"""A pipeline: networks, a scheduler, and the way from a seed to pictures."""

from minidiff.pipeline.pipeline import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput"]
