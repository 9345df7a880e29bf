"""The field's metrics as formulas over features and pictures, without any network."""
