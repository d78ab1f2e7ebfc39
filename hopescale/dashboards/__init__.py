"""Dashboards of a run's metrics: what they show, as plain data, and their form as Grafana and Prometheus want it."""
