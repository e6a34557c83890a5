from .gmres import gmres as gmres, Krylov as Krylov
