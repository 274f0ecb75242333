"""The methods of adaptation, one file each; `choice` picks by the contract."""
