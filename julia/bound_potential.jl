# The curvature of a potential's network in explicit products, and the pullback of all of it (pyrnode/dynamics/bound_potential.py).
#
# Products: ∇²Φ ε is the derivative of the gradient's two sweeps along ε, and is pulled back through both. Exact: with
# M = −τ̄ I + 2 ν̄ ∇²Φ the cotangents τ̄ of the trace of ∂f/∂z and ν̄ of its squared norm give J̄_i = 2 c_i ⊙ J_i M and c̄_i = J_iᵀ M J_i.
#
# What is asked of the curvature is pulled back first, which leaves cotangents of a_i and y_i; then the gradient, whose transpose
# runs forward (q = Ḡ, v̄_i = W_i q, q ← q + h_i φ' ⊙ v̄_i + ȳ_i, ā_i += c_i ⊙ v̄_i); then the network, back as usual.

"What the derivative of the gradient's two sweeps along the probes leaves, matrices (…, batch k)."
struct Products{A<:AbstractArray}
    ε::A
    u::Vector{A}   # u̇, of all layers but the last
    a::Vector{A}   # ȧ
    y::Vector{A}   # ẏ, of all but the last, where y is w
    v::Vector{A}   # v̇
    w::A           # −∇²Φ ε
end

function Products(array, network::PotentialNetwork, n)
    s, L = inputs(network), network.depth
    arrays(count) = [array(network.width, n) for _ in 1:count]
    return Products(array(s, n), arrays(L - 1), arrays(L), arrays(L - 1), arrays(L), array(network.dim, n))
end

"The layers' Jacobians `J` = ∂a/∂z and `U` = ∂u/∂z as (m, batch d), the Hessian of Φ as (d, d batch), trace and squared norm as (1, batch)."
struct Jacobians{A<:AbstractArray}
    J::Vector{A}
    U::Vector{A}
    hessian::A
    trace::A
    norm::A
    quadratic::A   # AᵀA in z
end

function Jacobians(array, network::PotentialNetwork, batch, J, quadratic)
    d, m, L = network.dim, network.width, network.depth
    arrays() = [array(m, batch * d) for _ in 1:(L - 1)]
    return Jacobians([[J]; arrays()], arrays(), array(d, d * batch), array(1, batch), array(1, batch), quadratic)
end

"What is the same for all samples: the first layer's Jacobian W_1 in z, and AᵀA."
function fixed_curvature(array, network, named, batch)
    d, m = network.dim, network.width
    J, quadratic, A = array(m, batch * d), array(d, d), named.A[1:d, :]
    reshape(J, m, batch, d) .= reshape(permutedims(named.weights[1][1:d, :]), m, 1, d)
    return J, mul!(quadratic, A, transpose(A))
end

seen(tape, p::Products, hjb) = Evaluation(tape.f; w=reshape(p.w, size(tape.f)..., :), hjb)
seen(tape, j::Jacobians, hjb) = Evaluation(tape.f; j.trace, j.norm, hjb)

"c_i = h_i φ''(a_i) ⊙ y_i, of every layer."
function weights!(bound)
    tape, φ = bound.tape, bound.network.φ
    for (i, h) in enumerate(bound.h)
        each!((ρ, y) -> h * bend(φ, ρ) * y, bound.work.c[i], tape.ρ[i], tape.y[i])
    end
    return nothing
end

"w = −∇²Φ ε."
function curve!(bound, p::Products, ε)
    tape, work, φ, d, L = bound.tape, bound.work, bound.network.φ, bound.network.dim, length(bound.layers)
    weights!(bound)
    in_rows!(p.ε, ε)
    for i in 1:L
        apply!(p.a[i], bound.layers[i], i == 1 ? p.ε : p.u[i - 1])
        i < L && move!(φ, bound.h[i], p.u[i], p.a[i], i == 1 ? nothing : p.u[i - 1], tape.ρ[i])
    end
    for i in L:-1:1
        h, c, ρ = bound.h[i], work.c[i], tape.ρ[i]
        i == L ? along!(*, p.v[i], (p.a[i],), (c,)) :
        along!((a, y, c, ρ) -> muladd(c, a, h * slope(φ, ρ) * y), p.v[i], (p.a[i], p.y[i]), (c, ρ))
        i == 1 && break
        transpose!(p.y[i - 1], bound.layers[i], p.v[i])
        i < L && (p.y[i - 1] .+= p.y[i])
    end
    transpose!(work.η[1], bound.layers[1], p.v[1])
    transpose!(work.η[2], bound.A, apply!(work.Aη, bound.A, p.ε))
    p.w .= .-(view(work.η[1], 1:d, :) .+ view(work.η[2], 1:d, :))
    return nothing
end

"Trace and norm, from the layers' Jacobians."
function curve!(bound, j::Jacobians, ::UnitVectors)
    tape, work, φ, d, L = bound.tape, bound.work, bound.network.φ, bound.network.dim, length(bound.layers)
    weights!(bound)
    for i in 2:L
        move!(φ, bound.h[i - 1], j.U[i - 1], j.J[i - 1], i == 2 ? nothing : j.U[i - 2], tape.ρ[i - 1])
        apply!(j.J[i], bound.layers[i], j.U[i - 1])
    end
    H = reshape(j.hessian, d, d, :)
    H .= j.quadratic
    for i in 1:L
        along!(*, work.along[1], (j.J[i],), (work.c[i],))
        gram!(H, columns_of_samples(j.J[i], d), columns_of_samples(work.along[1], d))
    end
    unit = view(reshape(j.hessian, d * d, :), 1:(d + 1):(d * d), :)
    j.trace .= .-sum(unit; dims=1)
    j.norm .= sum(abs2, reshape(j.hessian, d * d, :); dims=1)
    return nothing
end

"u' ← u + h φ' ⊙ a of each direction, or φ' ⊙ a."
move!(φ, h, out, a, ::Nothing, ρ) = along!((a, ρ) -> h * slope(φ, ρ) * a, out, (a,), (ρ,))
move!(φ, h, out, a, u, ρ) = along!((a, u, ρ) -> muladd(h * slope(φ, ρ), a, u), out, (a, u), (ρ,))

function pullback!(bound::BoundPotential, z̄, c̄, bars::Cotangents, α)
    tape, work, d, a = bound.tape, bound.work, bound.network.dim, eltype(bound.θ̄)(α)
    foreach(x -> fill!(x, false), work.ab)
    foreach(x -> fill!(x, false), work.yb)
    weights!(bound)
    bars.w === nothing && bars.trace === nothing || pull_curvature!(bound, tape.curvature, bars, a)
    Ḡ = work.s[1]
    view(Ḡ, 1:d, :) .= .-bars.f
    bound.network.timed && fill!(view(Ḡ, d + 1, :), false)
    if bars.hjb !== nothing
        view(Ḡ, 1:d, :) .+= bars.hjb .* tape.f
        bound.network.timed && (view(Ḡ, (d + 1):(d + 1), :) .= bars.hjb)
    end
    pull_gradient!(bound, Ḡ, a)
    pull_network!(bound, a)
    apply!(work.AG, bound.A, Ḡ)
    accumulate!(bound.A, Ḡ, tape.As, a)
    accumulate!(bound.A, tape.s, work.AG, a)
    bound.bars.b .+= a .* batch_sum(Ḡ)
    transpose!(work.s[3], bound.A, work.AG)
    z̄ .= view(work.s[2], 1:d, :) .+ view(work.s[3], 1:d, :)
    if c̄ !== nothing
        m = bound.network.width
        view(c̄, 1:m, :) .+= a .* work.ab[1]
        view(c̄, (m + 1):size(c̄, 1), :) .+= a .* Ḡ
    end
    return z̄
end

"Pulls back ∇Φ, given its cotangent in s: leaves the whole of ā."
function pull_gradient!(bound, Ḡ, α)
    tape, work, φ = bound.tape, bound.work, bound.network.φ
    q, v_bar = work.m
    for (i, layer) in enumerate(bound.layers)
        h = bound.h[i]
        accumulate!(layer, i == 1 ? Ḡ : q, tape.v[i], α)
        apply!(v_bar, layer, i == 1 ? Ḡ : q)
        add_product!(work.ab[i], v_bar, work.c[i])
        i == 1 ? each!((v, ρ, y) -> muladd(slope(φ, ρ), v, y), q, v_bar, tape.ρ[i], work.yb[i]) :
        each!((q, v, ρ, y) -> q + muladd(h * slope(φ, ρ), v, y), q, q, v_bar, tape.ρ[i], work.yb[i])
    end
    bound.bars.w .+= α .* batch_sum(q)
    return nothing
end

"Pulls back what ran forward through the layers: leaves the cotangent of s, without that of the quadratic term, in `work.s[2]`."
function pull_network!(bound, α)
    tape, work, φ, L = bound.tape, bound.work, bound.network.φ, length(bound.layers)
    ū, spare = work.m
    for i in L:-1:1
        layer, h, a_bar = bound.layers[i], bound.h[i], work.ab[i]
        i < L && each!((a, u, ρ) -> muladd(h * slope(φ, ρ), u, a), a_bar, a_bar, ū, tape.ρ[i])
        accumulate!(layer, i == 1 ? tape.s : tape.u[i - 1], a_bar, α)
        bound.bars.biases[i] .+= α .* batch_sum(a_bar)
        i == 1 && return transpose!(work.s[2], layer, a_bar)
        transpose!(i == L ? ū : spare, layer, a_bar)
        i < L && (ū .+= spare)
    end
end

"Pulls back w = −∇²Φ ε: through the sweep that ran back, and then through the one that ran forward."
function pull_curvature!(bound, p::Products, bars, α)
    tape, work, φ, L, η = bound.tape, bound.work, bound.network.φ, length(bound.layers), bound.work.η[1]
    v_bar, y_bar = work.along[(L + 1):(L + 2)]
    in_rows!(η, bars.w)
    η .= .-η
    for (i, layer) in enumerate(bound.layers)
        h, q = bound.h[i], i == 1 ? η : y_bar
        accumulate!(layer, q, p.v[i], α)
        apply!(v_bar, layer, q)
        along!(*, work.along[i], (v_bar,), (work.c[i],))
        sum_along!(work.m[1], v_bar, p.a[i])
        weigh!(bound, i, work.m[1])
        i == L && break
        sum_along!(work.m[1], v_bar, p.y[i])
        add_bent!(bound, i, work.m[1])
        move!(φ, h, y_bar, v_bar, i == 1 ? nothing : y_bar, tape.ρ[i])
    end
    ū, spare = v_bar, y_bar
    for i in L:-1:1
        layer, a_bar = bound.layers[i], work.along[i]
        if i < L
            sum_along!(work.m[1], ū, p.a[i])
            add_bent!(bound, i, work.m[1])
            move!(φ, bound.h[i], a_bar, ū, a_bar, tape.ρ[i])
        end
        accumulate!(layer, i == 1 ? p.ε : p.u[i - 1], a_bar, α)
        i == 1 && break
        transpose!(i == L ? ū : spare, layer, a_bar)
        i < L && (ū .+= spare)
    end
    accumulate!(bound.A, η, apply!(work.Aη, bound.A, p.ε), α)
    accumulate!(bound.A, p.ε, apply!(work.Aη, bound.A, η), α)
    return nothing
end

"Pulls back trace and norm."
function pull_curvature!(bound, j::Jacobians, bars, α)
    tape, work, φ, d, L = bound.tape, bound.work, bound.network.φ, bound.network.dim, length(bound.layers)
    J_bar, U_bar, spare = work.along
    M = quadratic_form!(reshape(work.M, d, d, :), reshape(j.hessian, d, d, :), bars.trace, bars.norm)
    for i in L:-1:1
        layer, J = bound.layers[i], j.J[i]
        times!(columns_of_samples(J_bar, d), columns_of_samples(J, d), M)
        sum_along!(work.m[1], J, J_bar)
        weigh!(bound, i, work.m[1])
        along!((x, c) -> 2c * x, J_bar, (J_bar,), (work.c[i],))
        if i < L
            sum_along!(work.m[1], J, U_bar)
            add_bent!(bound, i, work.m[1])
            move!(φ, bound.h[i], J_bar, U_bar, J_bar, tape.ρ[i])
        end
        i == 1 && break
        accumulate!(layer, j.U[i - 1], J_bar, α)
        transpose!(i == L ? U_bar : spare, layer, J_bar)
        i < L && (U_bar .+= spare)
    end
    total = dropdims(sum(columns_of_samples(J_bar, d); dims=2); dims=2)
    view(bound.bars.weights[1], 1:d, :) .+= α .* transpose(total)
    view(bound.bars.A, 1:d, :) .+= (2α) .* pulled_quadratic(M, bound.named.A[1:d, :])
    return nothing
end

"M = −τ̄ I + 2 ν̄ ∇²Φ of each sample (d, d, batch); without ν̄, what I is multiplied by, (1, batch)."
quadratic_form!(M, H, trace, ::Nothing) = .-trace
function quadratic_form!(M, H, trace, norm)
    M .= 2 .* reshape(norm, 1, 1, :) .* H
    d = size(M, 1)
    view(reshape(M, d * d, :), 1:(d + 1):(d * d), :) .-= trace
    return M
end

pulled_quadratic(τ::AbstractMatrix, A) = sum(τ) .* A
pulled_quadratic(M, A) = dropdims(sum(M; dims=3); dims=3) * A

"Pulls back the cotangent of c_i = h_i φ''(a_i) ⊙ y_i."
function weigh!(bound, i, c_bar)
    tape, work, φ, h = bound.tape, bound.work, bound.network.φ, bound.h[i]
    each!((a, ρ, y, c) -> muladd(h * twist(φ, ρ) * y, c, a), work.ab[i], work.ab[i], tape.ρ[i], tape.y[i], c_bar)
    each!((y, ρ, c) -> muladd(h * bend(φ, ρ), c, y), work.yb[i], work.yb[i], tape.ρ[i], c_bar)
    return nothing
end

"ā_i += h_i φ'' ⊙ x."
function add_bent!(bound, i, x)
    φ, h = bound.network.φ, bound.h[i]
    each!((a, ρ, x) -> muladd(h * bend(φ, ρ), x, a), bound.work.ab[i], bound.work.ab[i], bound.tape.ρ[i], x)
    return nothing
end

function gradient!(θ̄, bound::BoundPotential)
    θ̄ .+= bound.θ̄
    fill!(bound.θ̄, false)
    return θ̄
end

# --- arrays along several directions: matrices (m, batch k) beside (m, batch) ---

"(s, batch k) ← (d, batch, k), and zeros in the row of time, which no probe has."
function in_rows!(out, x)
    rows, all = size(x, 1), reshape(out, size(out, 1), size(x, 2), :)
    view(all, 1:rows, :, :) .= x
    size(out, 1) > rows && fill!(view(all, rows + 1, :, :), false)
    return out
end

"(m, batch d) as (m, batch, d)."
columns_of_samples(x, d) = reshape(x, size(x, 1), :, d)

"out ← op(xs..., ys...), the ys the same in all directions."
along!(op::F, out, xs, ys) where {F} = (three(out, ys) .= op.(map(x -> three(x, ys), xs)..., ys...); nothing)
three(x, ys) = reshape(x, size(ys[1])..., :)

function along!(op::F, out::Matrix{T}, xs::NTuple{M,Matrix{T}}, ys::NTuple{N,Matrix{T}}) where {F,T,M,N}
    n = length(ys[1])
    for start in 0:n:(length(out) - 1)
        @inbounds @simd ivdep for i in 1:n
            out[start + i] = op(map(x -> x[start + i], xs)..., map(y -> y[i], ys)...)
        end
    end
    return nothing
end

"total ← Σ x ⊙ y over the directions."
sum_along!(total, x, y) = sum!(reshape(total, size(total)..., 1), three(x, (total,)) .* three(y, (total,)))

function sum_along!(total::Matrix{T}, x::Matrix{T}, y::Matrix{T}) where {T}
    n = length(total)
    fill!(total, false)
    for start in 0:n:(length(x) - 1)
        @inbounds @simd ivdep for i in 1:n
            total[i] = muladd(x[start + i], y[start + i], total[i])
        end
    end
    return nothing
end

"Up to how many dimensions the products of each sample's few columns are loops; beyond, BLAS's."
const FEW = 6

by_sample(x) = permutedims(x, (1, 3, 2))

"H (d, d, batch) += JᵀK of each sample, J and K (m, batch, d)."
gram!(H, J, K) = (H .+= NNlib.batched_mul(NNlib.batched_transpose(by_sample(J)), by_sample(K)); nothing)

function gram!(H::Array{T,3}, J::Array{T,3}, K::Array{T,3}) where {T<:BlasReal}
    d = size(J, 3)
    d > FEW && return foreach(j -> mul!(view(H, :, :, j), transpose(view(J, :, j, :)), view(K, :, j, :), true, true), axes(J, 2))
    for q in 1:d, p in 1:q, j in axes(J, 2)
        total = zero(T)
        @inbounds @simd for i in axes(J, 1)
            total = muladd(J[i, j, p], K[i, j, q], total)
        end
        H[p, q, j] += total
        p == q || (H[q, p, j] += total)
    end
    return nothing
end

"out ← J M of each sample, out and J (m, batch, d); M (d, d, batch), or numbers (1, batch)."
times!(out, J, M) = (out .= by_sample(NNlib.batched_mul(by_sample(J), M)); nothing)
times!(out, J, τ::AbstractMatrix) = (out .= J .* τ; nothing)

function times!(out::Array{T,3}, J::Array{T,3}, M::Array{T,3}) where {T<:BlasReal}
    d = size(J, 3)
    d > FEW && return foreach(j -> mul!(view(out, :, j, :), view(J, :, j, :), view(M, :, :, j)), axes(J, 2))
    fill!(out, false)
    for p in 1:d, q in 1:d, j in axes(J, 2)
        x = M[q, p, j]
        @inbounds @simd ivdep for i in axes(J, 1)
            out[i, j, p] = muladd(J[i, j, q], x, out[i, j, p])
        end
    end
    return nothing
end
