"""A trained model that answers: loading, generating, converting."""
