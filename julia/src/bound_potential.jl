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

fixed_part(j::Jacobians) = (j.J[1], j.quadratic)
fixed_part(curvature) = nothing

seen(tape, p::Products, hjb) = Evaluation(tape.f; w=reshape(p.w, size(tape.f)..., :), hjb)
seen(tape, j::Jacobians, hjb) = Evaluation(tape.f; j.trace, j.norm, hjb)

"c_i = h_i φ''(a_i) ⊙ y_i, of every layer."
weights!(core) = foreach((c, h, ρ, y) -> bent!(c, core.network.φ, h, ρ, y), core.work.c, core.h, core.tape.ρ, core.tape.y)

"w = −∇²Φ ε."
function curve!(core, p::Products, ε)
    tape, work, φ, L = core.tape, core.work, core.network.φ, length(core.layers)
    weights!(core)
    in_rows!(along_samples(p.ε, ε), ε)
    for i in 1:L
        apply!(p.a[i], core.layers[i], i == 1 ? p.ε : p.u[i - 1])
        i < L && move!(φ, core.h[i], p.u[i], p.a[i], i == 1 ? nothing : p.u[i - 1], tape.ρ[i])
    end
    for i in L:-1:1
        along!(*, p.v[i], (p.a[i],), (work.c[i],))
        i < L && move!(φ, core.h[i], p.v[i], p.y[i], p.v[i], tape.ρ[i])
        i == 1 && break
        transpose!(p.y[i - 1], core.layers[i], p.v[i])
        i < L && each!(+, p.y[i - 1], p.y[i - 1], p.y[i])
    end
    transpose!(work.η[1], core.layers[1], p.v[1])
    apply!(work.Aη, core.A, p.ε)
    transpose!(work.η[2], core.A, work.Aη)
    from_rows!((x, y) -> -(x + y), p.w, work.η[1], work.η[2])
    return nothing
end

"Trace and norm, from the layers' Jacobians."
function curve!(core, j::Jacobians, ::UnitVectors)
    tape, work, d, L = core.tape, core.work, core.network.dim, length(core.layers)
    weights!(core)
    for i in 2:L
        move!(core.network.φ, core.h[i - 1], j.U[i - 1], j.J[i - 1], i == 2 ? nothing : j.U[i - 2], tape.ρ[i - 1])
        apply!(j.J[i], core.layers[i], j.U[i - 1])
    end
    H = reshape(j.hessian, d, d, :)
    H .= j.quadratic
    for i in 1:L
        along!(*, work.along[1], (j.J[i],), (work.c[i],))
        gram!(H, by_dimension(j.J[i], d), by_dimension(work.along[1], d))
    end
    return invariants!(j.trace, j.norm, reshape(j.hessian, d * d, :), 1:(d + 1):(d * d))
end

"Trace and squared norm of −H, each sample's a column of H, of which `diagonal` are the rows."
function invariants!(trace, norm, H, diagonal)
    trace .= .-sum(view(H, diagonal, :); dims=1)
    norm .= sum(abs2, H; dims=1)
    return nothing
end

function invariants!(trace::Matrix, norm::Matrix, H::Matrix, diagonal)
    for j in axes(H, 2)
        trace[j] = -sum(i -> H[i, j], diagonal)
        norm[j] = sum(i -> H[i, j]^2, axes(H, 1))
    end
    return nothing
end

function pullback!(bound::BoundPotential, z̄, c̄, bars::Cotangents, α)
    core, a = bound.core, eltype(bound.θ̄)(α)
    start_pullback!(core)
    bars.w === nothing || pull_curvature!(core, bound.curvature, bars.w, a)
    bars.trace === nothing || pull_curvature!(core, bound.curvature, bars.trace, bars.norm, a)
    slope_bar!(core.work.s[1], core.tape.f, bars.f, bars.hjb)
    pull_slopes!(core, a)
    from_rows!(+, z̄, core.work.s[2], core.work.s[3])
    c̄ === nothing || context_bar!(c̄, core.work.ab[1], core.work.s[1], a)
    return z̄
end

function start_pullback!(core)
    foreach((a, y) -> (fill!(a, false); fill!(y, false)), core.work.ab, core.work.yb)
    return weights!(core)
end

"Ḡ of ∇Φ in s: −f̄, and of the residual h̄ f and, in the row of time, h̄."
function slope_bar!(Ḡ, f, f̄, ::Nothing)
    in_rows!(Ḡ, f̄, false)
    Ḡ .= .-Ḡ
    return nothing
end

function slope_bar!(Ḡ, f, f̄, hjb)
    slope_bar!(Ḡ, f, f̄, nothing)
    d = size(f, 1)
    view(Ḡ, 1:d, :) .+= hjb .* f
    size(Ḡ, 1) > d && (view(Ḡ, (d + 1):(d + 1), :) .= hjb)
    return nothing
end

context_bar!(c̄, a_bar, Ḡ, α) = (c̄ .+= α .* vcat(a_bar, Ḡ); nothing)

"Pulls back ∇Φ, given its cotangent in s in `work.s[1]`, to s: into `work.s[2]`, and what the quadratic term gives into `work.s[3]`."
function pull_slopes!(core, α)
    tape, work, Ḡ = core.tape, core.work, core.work.s[1]
    pull_gradient!(core, Ḡ, α)
    pull_network!(core, α)
    apply!(work.AG, core.A, Ḡ)
    accumulate!(core.A, Ḡ, tape.As, α)
    accumulate!(core.A, tape.s, work.AG, α)
    add_sum!(core.bars.b, Ḡ, α)
    transpose!(work.s[3], core.A, work.AG)
    return nothing
end

add_sum!(total, x, α) = (total .+= α .* batch_sum(x); nothing)

"The sweep back, pulled back: leaves the whole of ā."
function pull_gradient!(core, Ḡ, α)
    tape, work, φ = core.tape, core.work, core.network.φ
    q, v_bar = work.m
    for (i, layer) in enumerate(core.layers)
        accumulate!(layer, i == 1 ? Ḡ : q, tape.v[i], α)
        apply!(v_bar, layer, i == 1 ? Ḡ : q)
        add_product!(work.ab[i], v_bar, work.c[i])
        i == 1 ? sloped!(q, φ, core.h[1], tape.ρ[1], v_bar) : add_sloped!(q, φ, core.h[i], tape.ρ[i], v_bar)
        each!(+, q, q, work.yb[i])
    end
    return add_sum!(core.bars.w, q, α)
end

"What ran forward through the layers, pulled back."
function pull_network!(core, α)
    tape, work, L = core.tape, core.work, length(core.layers)
    ū, spare = work.m
    for i in L:-1:1
        layer, a_bar = core.layers[i], work.ab[i]
        i < L && add_sloped!(a_bar, core.network.φ, core.h[i], tape.ρ[i], ū)
        accumulate!(layer, i == 1 ? tape.s : tape.u[i - 1], a_bar, α)
        add_sum!(core.bars.biases[i], a_bar, α)
        i == 1 && break
        transpose!(i == L ? ū : spare, layer, a_bar)
        i < L && each!(+, ū, ū, spare)
    end
    transpose!(work.s[2], core.layers[1], work.ab[1])
    return nothing
end

"Pulls back w = −∇²Φ ε: through the sweep that ran back, and then through the one that ran forward."
function pull_curvature!(core, p::Products, w_bar, α)
    tape, work, φ, L, η = core.tape, core.work, core.network.φ, length(core.layers), core.work.η[1]
    v_bar, y_bar = work.along[L + 1], work.along[L + 2]
    in_rows!(along_samples(η, w_bar), w_bar)
    each!(-, η, η)
    for (i, layer) in enumerate(core.layers)
        q = i == 1 ? η : y_bar
        accumulate!(layer, q, p.v[i], α)
        apply!(v_bar, layer, q)
        along!(*, work.along[i], (v_bar,), (work.c[i],))
        sum_along!(work.m[1], v_bar, p.a[i])
        weigh!(core, i, work.m[1])
        i == L && break
        sum_along!(work.m[1], v_bar, p.y[i])
        add_bent!(work.ab[i], φ, core.h[i], tape.ρ[i], work.m[1])
        move!(φ, core.h[i], y_bar, v_bar, i == 1 ? nothing : y_bar, tape.ρ[i])
    end
    ū, spare = v_bar, y_bar
    for i in L:-1:1
        layer, a_bar = core.layers[i], work.along[i]
        i < L && pull_along!(core, i, a_bar, p.a[i], ū)
        accumulate!(layer, i == 1 ? p.ε : p.u[i - 1], a_bar, α)
        i == 1 && break
        transpose!(i == L ? ū : spare, layer, a_bar)
        i < L && each!(+, ū, ū, spare)
    end
    apply!(work.Aη, core.A, p.ε)
    accumulate!(core.A, η, work.Aη, α)
    apply!(work.Aη, core.A, η)
    accumulate!(core.A, p.ε, work.Aη, α)
    return nothing
end

"Pulls back u̇ = h φ' ⊙ ȧ + …: adds to the cotangent of ȧ, and to ā."
function pull_along!(core, i, a_dot_bar, a_dot, u_dot_bar)
    work, φ, h, ρ = core.work, core.network.φ, core.h[i], core.tape.ρ[i]
    sum_along!(work.m[1], u_dot_bar, a_dot)
    add_bent!(work.ab[i], φ, h, ρ, work.m[1])
    return move!(φ, h, a_dot_bar, u_dot_bar, a_dot_bar, ρ)
end

"Pulls back trace and norm."
function pull_curvature!(core, j::Jacobians, trace, norm, α)
    d = core.network.dim
    M = quadratic_form!(reshape(core.work.M, d, d, :), reshape(j.hessian, d, d, :), trace, norm)
    return pull_jacobians!(core, j, M, α)
end

function pull_jacobians!(core, j, M, α)
    work, d, L = core.work, core.network.dim, length(core.layers)
    J_bar, U_bar, spare = work.along
    for i in L:-1:1
        layer, J = core.layers[i], j.J[i]
        times!(by_dimension(J_bar, d), by_dimension(J, d), M)
        sum_along!(work.m[1], J, J_bar)
        weigh!(core, i, work.m[1])
        along!((x, c) -> 2c * x, J_bar, (J_bar,), (work.c[i],))
        i < L && pull_along!(core, i, J_bar, J, U_bar)
        i == 1 && break
        accumulate!(layer, j.U[i - 1], J_bar, α)
        transpose!(i == L ? U_bar : spare, layer, J_bar)
        i < L && each!(+, U_bar, U_bar, spare)
    end
    add_first!(core.bars.weights[1], by_dimension(J_bar, d), α)
    view(core.bars.A, 1:d, :) .+= (2α) .* pulled_quadratic(M, core.named.A[1:d, :])
    return nothing
end

"The gradient of W_1, from the cotangents (m, batch, d) of its Jacobian."
add_first!(W̄, J̄, α) = (view(W̄, axes(J̄, 3), :) .+= α .* transpose(dropdims(sum(J̄; dims=2); dims=2)); nothing)

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
function weigh!(core, i, c_bar)
    tape, work, φ, h = core.tape, core.work, core.network.φ, core.h[i]
    add_twisted!(work.ab[i], φ, h, tape.ρ[i], tape.y[i], c_bar)
    return add_bent!(work.yb[i], φ, h, tape.ρ[i], c_bar)
end

function gradient!(θ̄, bound::BoundPotential)
    θ̄ .+= bound.θ̄
    fill!(bound.θ̄, false)
    return θ̄
end

# --- number by number: here the activation's type is known ---

"out ← op(xs...)."
each!(op::F, out, xs...) where {F} = (out .= op.(xs...); nothing)

function each!(op::F, out::Matrix{T}, xs::Vararg{Matrix{T},N}) where {F,T,N}
    @inbounds @simd ivdep for i in eachindex(out, xs...)
        out[i] = op(map(x -> x[i], xs)...)
    end
    return nothing
end

"out ← h φ' ⊙ x, h φ'' ⊙ x, and out ← out + the same, and + h φ‴ ⊙ y ⊙ x, at the roots ρ."
sloped!(out, φ, h, ρ, x) = each!((ρ, x) -> h * slope(φ, ρ) * x, out, ρ, x)
bent!(out, φ, h, ρ, x) = each!((ρ, x) -> h * bend(φ, ρ) * x, out, ρ, x)
add_sloped!(out, φ, h, ρ, x) = each!((out, ρ, x) -> muladd(h * slope(φ, ρ), x, out), out, out, ρ, x)
add_bent!(out, φ, h, ρ, x) = each!((out, ρ, x) -> muladd(h * bend(φ, ρ), x, out), out, out, ρ, x)
add_twisted!(out, φ, h, ρ, y, x) = each!((out, ρ, y, x) -> muladd(h * twist(φ, ρ) * y, x, out), out, out, ρ, y, x)

"u' ← u + h φ' ⊙ a of each direction, or h φ' ⊙ a."
move!(φ, h, out, a, ::Nothing, ρ) = along!((a, ρ) -> h * slope(φ, ρ) * a, out, (a,), (ρ,))
move!(φ, h, out, a, u, ρ) = along!((a, u, ρ) -> muladd(h * slope(φ, ρ), a, u), out, (a, u), (ρ,))

# --- arrays along several directions: matrices (m, batch k) beside (m, batch) ---

"(s, batch k) as (s, batch, k), for probes (d, batch, k)."
along_samples(x, ε) = reshape(x, size(x, 1), size(ε, 2), :)

"(s, batch, k) ← (d, batch, k), and zeros in the row of time, which no probe has."
function in_rows!(out, x)
    d = size(x, 1)
    view(out, 1:d, :, :) .= x
    size(out, 1) > d && fill!(view(out, d + 1, :, :), false)
    return nothing
end

"(m, batch d) as (m, batch, d)."
by_dimension(x, d) = reshape(x, size(x, 1), :, d)

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
    d > FEW && return foreach(axes(J, 2)) do j
        BLAS.gemm!('T', 'N', one(T), view(J, :, j, :), view(K, :, j, :), one(T), view(H, :, :, j))
    end
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
    d > FEW && return foreach(axes(J, 2)) do j
        BLAS.gemm!('N', 'N', one(T), view(J, :, j, :), view(M, :, :, j), zero(T), view(out, :, j, :))
    end
    fill!(out, false)
    for p in 1:d, q in 1:d, j in axes(J, 2)
        x = M[q, p, j]
        @inbounds @simd ivdep for i in axes(J, 1)
            out[i, j, p] = muladd(J[i, j, q], x, out[i, j, p])
        end
    end
    return nothing
end
