"""`make demo`: a real guest's memory taken, given back and reported, live on a terminal."""
