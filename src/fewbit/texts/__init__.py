"""Texts to calibrate, evaluate and train on."""
