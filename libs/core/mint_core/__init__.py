"""What every service stands on: errors and statuses, names, settings, server, channel, logs, clocks, failpoints."""
