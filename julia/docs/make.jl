# RNODE's own page: julia --project=julia/docs -e 'using Pkg; Pkg.develop(path="julia")', and then julia --project=julia/docs julia/docs/make.jl
# It runs the docstrings' examples, and fails where one gives something else, or where something exported has no docstring.
using Documenter, RNODE

DocMeta.setdocmeta!(RNODE, :DocTestSetup, :(using RNODE); recursive=true)

makedocs(;
    sitename="RNODE", modules=[RNODE], pages=["index.md", "reference.md"], checkdocs=:exports, remotes=nothing,
    format=Documenter.HTML(; edit_link=nothing, repolink=nothing),
)
