"""Configuration: one YAML a run, checked when it is read."""

from distpc.config.load import dump_config, load_config, parse_config
from distpc.config.schema import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config", "parse_config"]
