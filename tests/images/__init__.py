"""The image room: locks, image files, and page cache, on real files."""
