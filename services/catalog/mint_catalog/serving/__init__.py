"""What serves: aliases with their canaries and gates, resolution, engine replicas and what they hold."""
