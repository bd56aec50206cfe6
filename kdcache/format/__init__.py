"""What is on disk: schema, encodings, HDF5 layout and strict parser, manifest, identities. NumPy and h5py only."""
