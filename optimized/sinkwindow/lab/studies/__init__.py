"""Studies beyond the seed's two experiments: each is collected once as a record, and rendered elsewhere."""
