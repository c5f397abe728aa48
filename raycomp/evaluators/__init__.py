"""How compressors train a model, calibrate and judge it outside of a job."""
