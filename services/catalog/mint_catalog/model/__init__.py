"""What the catalog keeps: records, the keys they lie under, and how they are written down."""
