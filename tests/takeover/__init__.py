"""The whole daemon under its keeper, killed in every place: what VMMs and guests get to see."""
