"""Training steps of published loops, in plain PyTorch, and of a framework: `bench.py` times them beside ours

Each is (net, x, y, optimiser) -> loss and does what our step does: with the same random draws it attacks the
same images in evaluation mode, and minimises the same loss. The differences: some things are computed twice,
and the network itself is attacked, with its batch norms unfolded.
"""
import torch
import torch.nn.functional as F

EPS, STEP, STEPS = 8/255, 2/255, 10

def near(at, x, eps): return torch.min(torch.max(at, x-eps), x+eps).clamp(0, 1)
def noisy(x): return x+.001*torch.randn(x.shape, device=x.device, dtype=x.dtype)

def spat_robustness(cos_adv, cos, s, alpha):
    "L_rob of spat.py, summed over the batch: k (k+n), with k = p log(p/q)"
    p, q = F.softmax(s*cos, 1), F.softmax(s*cos_adv, 1)
    k = p*torch.log(p/q)
    return (k*(k+alpha)).sum()

def spat_step(net, x, y, optimiser, *, s=5., alpha=.2, beta=.2, lam=6., eps=EPS, step=STEP, steps=STEPS):
    "SPAT as released (spat.py): a net with a cosine head, which sees the clean images at every inner step"
    net.eval(); at = noisy(x)
    for _ in range(steps):
        at.requires_grad_()
        grad, = torch.autograd.grad(spat_robustness(net(at), net(x), s, alpha), [at])
        at = near(at.detach()+step*grad.sign(), x, eps)
    net.train(); optimiser.zero_grad()
    cos, cos_adv = net(x), net(at)
    true = F.one_hot(y, cos.shape[1]).bool()
    accuracy = F.cross_entropy(s*torch.where(true, 1+beta-cos, cos+beta)*cos, y)
    loss = accuracy+lam*spat_robustness(cos_adv, cos, s, alpha)/len(x)
    loss.backward(); optimiser.step()
    return loss.detach()

def mair_step(net, x, y, optimiser, *, eps=EPS, step=STEP, steps=STEPS):
    "Adversarial training by MAIR, the framework of torchattacks' author, without its records and schedules"
    from mair import RobModel
    from mair.defenses import AT
    trainer = AT(RobModel(net, n_classes=10), eps, step, steps)
    trainer.setup(optimiser); trainer.rmodel.train()
    cost = trainer.calculate_cost((x, y))
    optimiser.zero_grad(); cost.backward(); optimiser.step()
    return cost.detach()

def mart_step(net, x, y, optimiser, *, beta=5., eps=EPS, step=STEP, steps=STEPS):
    "MART as released (mart.py): inner cross-entropy, then a forward pass each of clean and attacked images"
    net.eval(); at = noisy(x)
    for _ in range(steps):
        at.requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(net(at), y), [at])
        at = near(at.detach()+step*grad.sign(), x, eps)
    net.train(); optimiser.zero_grad()
    z, z_adv = net(x), net(at)
    q, p = F.softmax(z_adv, 1), F.softmax(z, 1)
    first_two = torch.argsort(q, dim=1)[:, -2:]
    wrong = torch.where(first_two[:, -1] == y, first_two[:, -2], first_two[:, -1])
    boosted = F.cross_entropy(z_adv, y)+F.nll_loss(torch.log(1.0001-q+1e-12), wrong)
    true = p.gather(1, y[:, None])[:, 0]
    kl = F.kl_div(torch.log(q+1e-12), p, reduction='none').sum(1)
    loss = boosted+beta*(kl*(1.0000001-true)).mean()
    loss.backward(); optimiser.step()
    return loss.detach()

def dra_step(net, x, y, optimiser, *, eps=2/255, p=1/3, steps=5):
    """DRA has no released code: Algorithm 1 line by line, read as in `dra`,
    then clean and attacked images in equal parts"""
    net.eval(); at = x.clone()
    for _ in range(steps):
        at.requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(net(at), y), [at])
        length = grad.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
        at = (at.detach()+eps/steps*grad/length).clamp(0, 1)
    size = grad.abs().flatten(1)
    least = size.topk(round(p*size.shape[1]), dim=1).values[:, -1].view(-1, 1, 1, 1)
    at = torch.where(grad.abs() < least, x, at)
    net.train(); optimiser.zero_grad()
    loss = (F.cross_entropy(net(x), y)+F.cross_entropy(net(at), y))/2
    loss.backward(); optimiser.step()
    return loss.detach()
