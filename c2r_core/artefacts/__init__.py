"""What is kept, where, and what it rests on: cells, cache, fingerprints, profiles, paths, files."""
