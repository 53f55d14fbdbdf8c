// Calls between the page and a worker, in both directions: each side gives its methods and gets a function
// call(method, ...arguments) → promise of what the other side's method returns, or throws.

export function connect(port, methods) {
  const waiting = new Map();
  let next = 0;
  port.onmessage = async ({ data: { id, method, args, result, error } }) => {
    if (method) {
      try {
        port.postMessage({ id, result: await methods[method](...args) });
      } catch (thrown) {
        port.postMessage({ id, error: thrown.message });
      }
      return;
    }
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  return (method, ...args) => new Promise((resolve, reject) => {
    waiting.set(next, { resolve, reject });
    port.postMessage({ id: next++, method, args });
  });
}
