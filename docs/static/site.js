// Tables of class "scoreboard": sorted by a click on a heading, filtered by search words and by column values. No server.
const FILTERED = ['document', 'on print', "the paper's own table", 'on its own numbers', 'on ours', 'scale', 'verdict']

const said = cell => cell.textContent.trim()
const kind = cell => cell.innerText.trim().split(/[:\n]/)[0].replace(/^[^\p{L}\d]+/u, '') // without mark and reason

function compared(a, b) {                              // numbers by value; cells without one come last
  const number = t => { const m = t.replace('\u2212', '-').match(/^[<>~ ]*([+-]?\d+(\.\d+)?)/); return m ? +m[1] : NaN }
  const x = number(a), y = number(b)
  if (!isNaN(x) && !isNaN(y)) return x - y
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1
  return a.localeCompare(b, 'en', { numeric: true })
}

function sortable(table, heads) {
  heads.forEach((head, i) => {
    const button = document.createElement('button')
    button.type = 'button'; button.title = 'sort'; button.append(...head.childNodes); head.append(button)
    button.addEventListener('click', () => {
      const down = head.ariaSort === 'ascending'
      heads.forEach(h => h.removeAttribute('aria-sort'))
      head.ariaSort = down ? 'descending' : 'ascending'
      const rows = [...table.tBodies[0].rows]
      rows.sort((a, b) => compared(said(a.cells[i]), said(b.cells[i])) * (down ? -1 : 1))
      table.tBodies[0].append(...rows)
    })
  })
}

function field(name, input) {
  const label = document.createElement('label')
  label.append(name, input)
  return label
}

function filterable(table, heads) {
  const rows = [...table.tBodies[0].rows], bar = document.createElement('div'), tests = []
  const count = document.createElement('output'), words = document.createElement('input')
  const apply = () => {
    rows.forEach(row => { row.hidden = !tests.every(test => test(row)) })
    count.textContent = `${rows.filter(r => !r.hidden).length} of ${rows.length}`
  }
  heads.forEach((head, i) => {
    if (!FILTERED.includes(said(head))) return
    const select = document.createElement('select')
    const kinds = new Map(rows.map(r => [r, kind(r.cells[i])])) // computed now: a hidden row has no first line
    const options = [...new Set(kinds.values())].filter(Boolean).sort()
    select.append(new Option('all', ''), ...options.map(o => new Option(o, o)))
    tests.push(row => !select.value || kinds.get(row) === select.value)
    select.addEventListener('change', apply)
    bar.append(field(said(head), select))
  })
  words.type = 'search'
  tests.push(row => row.textContent.toLowerCase().includes(words.value.toLowerCase()))
  words.addEventListener('input', apply)
  bar.className = 'board-filters'; bar.append(field('search', words), count)
  ;(table.closest('.pst-scrollable-table-container') || table).before(bar)
  apply()
}

document.querySelectorAll('table.scoreboard, table.cards').forEach(table => {
  const heads = table.tHead ? [...table.tHead.rows[0].cells] : []
  if (!heads.length || !table.tBodies.length) return
  table.classList.add('board')
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => { // on a phone a row is a card
    if (said(heads[i])) cell.dataset.label = said(heads[i])
    cell.classList.toggle('empty', !said(cell))
  })
  if (!table.matches('.scoreboard') || table.tBodies[0].rows.length < 3) return
  filterable(table, heads); sortable(table, heads)
})
