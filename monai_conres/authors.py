from monai_conres.released import convert_released_state_dict as convert_authors_state_dict  # noqa  temporary, untracked
