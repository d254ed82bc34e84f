"""Tables of runs from files, folders, frames and training curves."""
