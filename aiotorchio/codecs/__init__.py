"""Objects <-> skeletons, in two codecs."""
