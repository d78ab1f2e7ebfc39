"""From YAML files and key=value overrides to one frozen, typed configuration."""
